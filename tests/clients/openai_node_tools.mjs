// openai-node, unchanged: answers of a given form, whole, streamed and parsed.
// Run by test_clients.py: argv[2] is the server, argv[3] how to draw.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [baseURL, wanted] = [process.argv[2], JSON.parse(process.argv[3])];
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const ask = { model: "demo", messages: wanted.messages, seed: 1, ...wanted.drawn };

const Toy = z.object({ colour: z.enum(["red", "blue"]), price: z.int().min(0).max(99).nullable() });
const Pet = z.object({ name: z.string().max(12), kind: z.enum(["dog", "cat"]), toys: z.array(Toy).min(1).max(2) });

async function checkParse() {
  const format = { ...ask, response_format: zodResponseFormat(Pet, "pet") };
  const { message, finish_reason } = (await client.chat.completions.parse(format)).choices[0];
  assert.equal(finish_reason, "stop");
  assert.deepEqual(message.parsed, Pet.parse(JSON.parse(message.content)));
  const streamed = await client.chat.completions.stream(format).finalChatCompletion();
  assert.equal(streamed.choices[0].message.content, message.content);
  assert.deepEqual(streamed.choices[0].message.parsed, message.parsed);
}

async function checkObject() {
  const format = { ...ask, response_format: { type: "json_object" }, logit_bias: wanted.ends_objects };
  assert.deepEqual(JSON.parse((await client.chat.completions.create(format)).choices[0].message.content), {});
}

await checkParse();
await checkObject();
