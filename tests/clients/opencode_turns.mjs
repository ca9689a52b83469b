// The requests of opencode, which speaks by the AI SDK's openai-compatible provider: two system messages, many tools,
// `auto`, usage in the stream, and in later turns its calls with their results. Every event of the streams is checked.
// Run by test_clients.py: argv[2] is the server, argv[3] how to draw.

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { jsonSchema, stepCountIs, streamText, tool } from "ai";

const [baseURL, wanted] = [process.argv[2], JSON.parse(process.argv[3])];
const bodies = [];
const provider = createOpenAICompatible({
  name: "baton",
  baseURL,
  apiKey: "none",
  includeUsage: true,
  fetch: (url, init) => {
    bodies.push(JSON.parse(init.body));
    return fetch(url, init);
  },
});

const text = (description) => ({ type: "string", description });
const whole = (description) => ({ type: "number", description });
const object = (properties, required) =>
  jsonSchema({
    $schema: "https://json-schema.org/draft/2020-12/schema",
    type: "object",
    properties,
    required,
    additionalProperties: false,
  });
const todo = {
  type: "object",
  properties: { content: text("The task"), status: text("pending or completed"), priority: text("high or low") },
  required: ["content", "status", "priority"],
  additionalProperties: false,
};
const execute = async () => "The list is empty.";
const tools = {
  bash: tool({ description: "Runs a command.", inputSchema: object({ command: text("It"), timeout: whole("ms") }, ["command"]), execute }),
  edit: tool({
    description: "Replaces text in a file.",
    inputSchema: object(
      { filePath: text("Its path"), oldString: text("Old"), newString: text("New"), replaceAll: { type: "boolean" } },
      ["filePath", "oldString", "newString"],
    ),
    execute,
  }),
  glob: tool({ description: "Finds files.", inputSchema: object({ pattern: text("A glob") }, ["pattern"]), execute }),
  read: tool({
    description: "Reads a file.",
    inputSchema: object({ filePath: text("Its path"), offset: whole("A line"), limit: whole("Lines") }, ["filePath"]),
    execute,
  }),
  todowrite: tool({
    description: "Writes the list of tasks.",
    inputSchema: object({ todos: { type: "array", items: todo } }, ["todos"]),
    execute,
  }),
  todoread: tool({ description: "Reads the list of tasks.", inputSchema: object({}, []), execute }),
};
const ask = {
  model: provider.chatModel("demo"),
  tools,
  seed: 1,
  temperature: 0,
  maxOutputTokens: wanted.max_tokens,
  maxRetries: 0,
  allowSystemInMessages: true,
};
const system = [
  { role: "system", content: "You are an agent that helps with software." },
  { role: "system", content: "<env>\n  Working directory: /project\n  Platform: linux\n</env>" },
];

async function events(settings) {
  const parts = [];
  for await (const part of streamText({ ...ask, ...settings, onError: () => {} }).stream) {
    if (part.type === "error") throw part.error;
    parts.push(part);
  }
  return parts;
}

const kinds = (parts) => parts.map((part) => part.type).filter((kind, at, all) => kind !== all[at - 1]);

// The first turn, as a session starts: text in one piece of events, with the usage that its context bar shows.
async function checkFirstTurn() {
  const parts = await events({ messages: [...system, ...wanted.messages] });
  assert.deepEqual(kinds(parts), ["start", "start-step", "text-start", "text-delta", "text-end", "finish-step", "finish"]);
  const { totalUsage, finishReason } = parts.at(-1);
  assert.equal(finishReason, "length");
  assert.equal(totalUsage.outputTokens, wanted.max_tokens);
  const body = bodies.at(-1);
  assert.equal(body.stream_options.include_usage, true);
  assert.equal(body.tools.length, Object.keys(tools).length);
  assert.equal(body.tool_choice, "auto");
}

// A later turn of a session in which files were read: calls, of which two in one message, and their results.
async function checkLaterTurn() {
  const call = (toolCallId, toolName, input) => ({ type: "tool-call", toolCallId, toolName, input });
  const result = (toolCallId, toolName, value) => ({
    type: "tool-result",
    toolCallId,
    toolName,
    output: { type: "text", value },
  });
  const history = [
    { role: "assistant", content: [{ type: "text", text: "I look." }, call("call_1", "glob", { pattern: "*.md" })] },
    { role: "tool", content: [result("call_1", "glob", "a.md\nb.md")] },
    {
      role: "assistant",
      content: [call("call_2", "read", { filePath: "a.md" }), call("call_3", "read", { filePath: "b.md", limit: 9 })],
    },
    { role: "tool", content: [result("call_2", "read", "A dog."), result("call_3", "read", "<file>\nA ball.\n</file>")] },
  ];
  const parts = await events({ messages: [...system, ...wanted.messages, ...history] });
  assert.equal(kinds(parts).at(-1), "finish");
  assert.ok(parts.some((part) => part.type === "text-delta"));
  assert.deepEqual(bodies.at(-1).messages.map((message) => message.role).slice(3), ["assistant", "tool", "assistant", "tool", "tool"]);
}

// A turn that calls, whose result the next step has. `auto` calls nothing here, so one step is forced to one tool.
async function checkCall() {
  const prepareStep = ({ stepNumber }) => ({
    toolChoice: stepNumber === 0 ? { type: "tool", toolName: "todoread" } : "auto",
  });
  const loop = { prepareStep, stopWhen: stepCountIs(2), maxOutputTokens: 2 * wanted.max_tokens };
  const parts = await events({ messages: [...system, ...wanted.messages], ...loop });
  const calls = parts.filter((part) => part.type === "tool-call");
  assert.deepEqual(calls.map((call) => [call.toolName, call.input]), [["todoread", {}]]);
  assert.deepEqual(
    kinds(parts).filter((kind) => kind.startsWith("tool-")),
    ["tool-input-start", "tool-input-delta", "tool-input-end", "tool-call", "tool-result"],
  );
  const { messages } = bodies.at(-1);
  assert.equal(messages.at(-1).content, "The list is empty.");
  assert.equal(messages.at(-1).tool_call_id, messages.at(-2).tool_calls[0].id);
  assert.equal(kinds(parts).at(-1), "finish");
}

await checkFirstTurn();
await checkLaterTurn();
await checkCall();
