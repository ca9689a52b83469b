// Vercel's AI SDK, unchanged: generateText and streamText through its two providers for servers like this one.
// Run by test_clients.py: argv[2] is the server, argv[3] what must come back.

import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, streamText } from "ai";

const [baseURL, wanted] = [process.argv[2], JSON.parse(process.argv[3])];
const compatible = createOpenAICompatible({ name: "baton", baseURL, apiKey: "none", includeUsage: true });
const openai = createOpenAI({ baseURL, apiKey: "none" });
const ask = { messages: wanted.messages, temperature: 0, maxOutputTokens: wanted.max_tokens, maxRetries: 0 };

async function checkChat(model) {
  const answer = await generateText({ model, ...ask });
  assert.equal(answer.text, wanted.chat);
  assert.equal(answer.finishReason, "length");
  assert.equal(answer.usage.inputTokens, wanted.chat_prompt_tokens);
  assert.equal(answer.usage.outputTokens, wanted.max_tokens);
}

async function checkStream(model) {
  const stream = streamText({ model, ...ask, onError: ({ error }) => { throw error; } });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  assert.equal(text, wanted.chat);
  assert.equal(await stream.finishReason, "length");
  assert.equal((await stream.usage).outputTokens, wanted.max_tokens);
}

async function checkParameters(model) {
  const stop = wanted.chat.slice(20, 26);
  const cut = await generateText({ model, ...ask, stopSequences: [stop] });
  assert.equal(cut.text, wanted.chat.slice(0, wanted.chat.indexOf(stop)));
  assert.equal(cut.finishReason, "stop");
  const drawn = { ...ask, temperature: 1, topP: 0.95, seed: 7, presencePenalty: 0.1, frequencyPenalty: 0.1 };
  assert.equal((await generateText({ model, ...drawn })).text, (await generateText({ model, ...drawn })).text);
}

async function checkSystemAndHistory(model) {
  const history = [...wanted.messages, { role: "assistant", content: wanted.chat }, { role: "user", content: "Go on." }];
  const answer = await generateText({ model, ...ask, system: "Tell stories.", messages: history });
  assert.ok(answer.text.length > 0);
}

async function checkCompletion(model) {
  const { messages: _, ...rest } = ask;
  assert.equal((await generateText({ model, ...rest, prompt: wanted.prompt })).usage.outputTokens, wanted.max_tokens);
}

async function checkErrors(provider) {
  await assert.rejects(generateText({ model: provider("gpt-4"), ...ask }), (error) => {
    assert.ok(APICallError.isInstance(error), error);
    assert.equal(error.statusCode, 404);
    assert.match(error.message, /gpt-4/);
    return true;
  });
}

for (const model of [compatible.chatModel("demo"), openai.chat("demo")]) {
  await checkChat(model);
  await checkStream(model);
  await checkParameters(model);
  await checkSystemAndHistory(model);
}
for (const model of [compatible.completionModel("demo"), openai.completion("demo")]) await checkCompletion(model);
for (const provider of [compatible.chatModel, openai.chat]) await checkErrors(provider);
