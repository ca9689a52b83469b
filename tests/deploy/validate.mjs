// Validates objects that are no part of Kubernetes: a JSON list on stdin, the folder node_modules as argument. Prints a
// JSON list with an error for each, "" for those that are right, null for those that no package knows.
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const PACKAGES = {
  "keda.sh": "keda",
  "gateway.networking.k8s.io": "gateway-api",
  "monitoring.coreos.com": "prometheus-operator",
};

async function errorOf(object) {
  const [group, version] = object.apiVersion.split("/");
  if (!(group in PACKAGES)) return null;
  const file = resolve(process.argv[2], "@kubernetes-models", PACKAGES[group], group, version, "index.js");
  const kinds = await import(pathToFileURL(file));
  if (!(object.kind in kinds)) return null;
  try {
    new kinds[object.kind](object).validate();
    return "";
  } catch (error) {
    return error.message;
  }
}

console.log(JSON.stringify(await Promise.all(JSON.parse(readFileSync(0, "utf8")).map(errorOf))));
