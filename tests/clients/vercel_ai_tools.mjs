// Vercel's AI SDK, unchanged: objects of a given form, whole and streamed; by both providers.
// Run by test_clients.py: argv[2] is the server, argv[3] how to draw.

import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, NoObjectGeneratedError, Output, streamObject } from "ai";
import { z } from "zod";

const [baseURL, wanted] = [process.argv[2], JSON.parse(process.argv[3])];
const settings = { name: "baton", baseURL, apiKey: "none", includeUsage: true, supportsStructuredOutputs: true };
const compatible = createOpenAICompatible(settings);
const openai = createOpenAI({ baseURL, apiKey: "none" });
const { temperature, max_tokens, presence_penalty, frequency_penalty } = wanted.drawn;
const ask = {
  messages: wanted.messages,
  maxRetries: 0,
  seed: 1,
  temperature,
  maxOutputTokens: max_tokens,
  presencePenalty: presence_penalty,
  frequencyPenalty: frequency_penalty,
};

const Pet = z.object({ name: z.string().max(12), kind: z.enum(["dog", "cat"]), age: z.int().min(0).max(30) });

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

for (const model of [compatible.chatModel("demo"), openai.chat("demo")]) {
  await checkObject(model);
  await checkEnumAndArray(model);
  await checkCut(model);
}
