// Vercel's AI SDK, unchanged: objects of a given form, whole and streamed, and tools that it calls, by both providers.
// Run by test_clients.py: argv[2] is the server, argv[3] how to draw. Calls are forced, as the demo model makes none.

import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, NoObjectGeneratedError, Output, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const [baseURL, wanted] = [process.argv[2], JSON.parse(process.argv[3])];
const { max_tokens, ...sampling } = wanted.drawn;
const settings = { name: "baton", baseURL, apiKey: "none", includeUsage: true, supportsStructuredOutputs: true };
const compatible = createOpenAICompatible(settings);
const openai = createOpenAI({ baseURL, apiKey: "none" });
// The SDK sends no seed and no penalties to `responses`: they are added on the way.
const seeded = createOpenAI({
  baseURL,
  apiKey: "none",
  fetch: (url, init) => fetch(url, { ...init, body: JSON.stringify({ ...JSON.parse(init.body), ...sampling, seed: 1 }) }),
});
const ask = {
  messages: wanted.messages,
  maxRetries: 0,
  seed: 1,
  temperature: sampling.temperature,
  maxOutputTokens: max_tokens,
  presencePenalty: sampling.presence_penalty,
  frequencyPenalty: sampling.frequency_penalty,
};

const Pet = z.object({ name: z.string().max(12), kind: z.enum(["dog", "cat"]), age: z.int().min(0).max(30) });
const Walk = z.object({ pet: z.enum(["dog", "cat", "fox"]), minutes: z.int().min(1).max(90) });

async function checkObject(model) {
  const { object, finishReason, usage } = await generateObject({ model, ...ask, schema: Pet });
  assert.equal(finishReason, "stop");
  assert.deepEqual(object, Pet.parse(object));
  assert.ok(usage.outputTokens > 5);
  const stream = streamObject({ model, ...ask, schema: Pet });
  const partial = [];
  for await (const each of stream.partialObjectStream) partial.push(each);
  assert.ok(partial.length > 1);
  assert.deepEqual(partial.at(-1), object);
  assert.deepEqual(await stream.object, object);
}

async function checkEnumAndArray(model) {
  const choice = await generateObject({ model, ...ask, output: "enum", enum: ["happy", "sad"] });
  assert.ok(["happy", "sad"].includes(choice.object));
  const output = Output.object({ schema: z.object({ ages: z.array(Pet.shape.age).min(1).max(3) }) });
  const answer = await generateText({ model, ...ask, output });
  assert.ok(answer.output.ages.length > 0);
}

async function checkCut(model) {
  await assert.rejects(generateObject({ model, ...ask, maxOutputTokens: 3, schema: Pet }), (error) => {
    assert.ok(NoObjectGeneratedError.isInstance(error), error);
    assert.equal(error.finishReason, "length");
    return true;
  });
}

async function checkTools(model) {
  const walks = [];
  const execute = (walk) => walks.push(walk) && "It was fun.";
  const tools = { walk: tool({ inputSchema: Walk, description: "Take a pet for a walk.", execute }) };
  // The first step must call, the second has the answers and may: the demo model then tells a story.
  const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "auto" });
  const loop = { model, ...ask, maxOutputTokens: 100, tools, stopWhen: stepCountIs(2), prepareStep };
  const { steps } = await generateText(loop);
  assert.equal(steps.length, 2);
  assert.equal(steps[0].finishReason, "tool-calls");
  checkStep(steps[0], walks);
  assert.ok(steps[1].text.length > 0);

  const whole = walks.splice(0);
  const stream = streamText({ ...loop, onError: () => {} });
  const kinds = new Set();
  for await (const part of stream.stream) {
    if (part.type === "error") throw part.error;
    kinds.add(part.type);
  }
  checkStep((await stream.steps)[0], walks);
  assert.deepEqual(walks, whole);
  for (const kind of ["tool-input-start", "tool-input-delta", "tool-input-end", "tool-call", "tool-result"]) {
    assert.ok(kinds.has(kind), kind);
  }
}

function checkStep(step, walks) {
  assert.ok(walks.length > 0);
  assert.deepEqual(step.toolCalls.map((call) => call.input), walks);
  assert.equal(step.toolResults.length, walks.length);
  for (const walk of walks) assert.deepEqual(walk, Walk.parse(walk));
}

async function checkNamed(model) {
  const tools = { walk: tool({ inputSchema: Walk }), sleep: tool({ inputSchema: z.object({}) }) };
  for (const toolName of ["walk", "sleep"]) {
    const { toolCalls } = await generateText({ model, ...ask, tools, toolChoice: { type: "tool", toolName } });
    assert.equal(toolCalls[0].toolName, toolName);
  }
}

// What the model thinks before its answer, which the template of the demo model leaves out unless it is asked for.
async function checkReasoning() {
  const thinking = (reasoningEffort) => ({
    model: compatible.chatModel("demo"),
    ...ask,
    temperature: 0,
    maxOutputTokens: 16,
    providerOptions: { baton: { reasoningEffort } },
  });
  const { text, reasoningText, usage } = await generateText(thinking("high"));
  assert.equal(text, ""); // all of its tokens are those of the reasoning, which ends by length
  assert.ok(reasoningText.length > 0);
  assert.equal(usage.outputTokenDetails.reasoningTokens, 16);
  let streamed = "";
  for await (const part of streamText({ ...thinking("high"), onError: () => {} }).stream) {
    if (part.type === "error") throw part.error;
    if (part.type === "reasoning-delta") streamed += part.text;
  }
  assert.equal(streamed, reasoningText);
  const plain = await generateText(thinking("none"));
  assert.ok(plain.text.length > 0 && plain.reasoningText === undefined);
}

for (const model of [compatible.chatModel("demo"), openai.chat("demo"), seeded.responses("demo")]) {
  await checkObject(model);
  await checkEnumAndArray(model);
  await checkCut(model);
  await checkTools(model);
  await checkNamed(model);
}
await checkReasoning();
