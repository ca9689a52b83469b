// openai-node, unchanged: what its users call, against the server at argv[2]; argv[3] holds what must come back.
// Run by test_clients.py; a failed assertion ends it with a stack trace.

import assert from "node:assert/strict";
import OpenAI from "openai";

const [baseURL, wanted] = [process.argv[2], JSON.parse(process.argv[3])];
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const chat = { model: "demo", messages: wanted.messages, temperature: 0, max_tokens: wanted.max_tokens };
const completion = { model: "demo", prompt: wanted.prompt, temperature: 0, max_tokens: wanted.max_tokens };

async function checkModels() {
  const ids = [];
  for await (const model of client.models.list()) ids.push(model.id);
  assert.deepEqual(ids, ["demo"]);
  assert.equal((await client.models.retrieve("demo")).id, "demo");
}

async function checkChat() {
  const answer = await client.chat.completions.create(chat);
  assert.equal(answer.choices[0].message.content, wanted.chat);
  assert.equal(answer.choices[0].finish_reason, "length");
  assert.equal(answer.usage.prompt_tokens, wanted.chat_prompt_tokens);
  assert.equal(answer.usage.completion_tokens, wanted.max_tokens);
}

async function checkStream() {
  const stream = await client.chat.completions.create({
    ...chat,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  let usage = null;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage;
  }
  assert.equal(text, wanted.chat);
  assert.equal(usage.completion_tokens, wanted.max_tokens);
}

// The helper that accumulates a stream into the whole answer.
async function checkStreamEvents() {
  let text = "";
  const stream = client.chat.completions.stream({ ...chat, max_tokens: 400, logprobs: true, top_logprobs: 2 });
  stream.on("content", (delta) => (text += delta));
  const answer = await stream.finalChatCompletion();
  const whole = await client.chat.completions.create({ ...chat, max_tokens: 400 });
  assert.equal(answer.choices[0].message.content, whole.choices[0].message.content);
  assert.equal(text, whole.choices[0].message.content);
  assert.equal(answer.choices[0].finish_reason, "stop");
}

async function checkLogprobs() {
  const answer = await client.chat.completions.create({ ...chat, logprobs: true, top_logprobs: 3 });
  const entries = answer.choices[0].logprobs.content;
  assert.equal(Buffer.from(entries.flatMap((entry) => entry.bytes)).toString(), wanted.chat);
  for (const entry of entries) {
    assert.equal(entry.top_logprobs.length, 3);
    assert.equal(entry.top_logprobs[0].logprob, entry.logprob);
  }
}

async function checkChoicesAndStop() {
  const drawn = { ...chat, temperature: 1, seed: 11, n: 3 };
  const texts = (await client.chat.completions.create(drawn)).choices.map((choice) => choice.message.content);
  assert.equal(new Set(texts).size, 3);
  const again = (await client.chat.completions.create(drawn)).choices.map((choice) => choice.message.content);
  assert.deepEqual(again, texts);
  const stop = wanted.chat.slice(20, 26);
  const [cut] = (await client.chat.completions.create({ ...chat, stop })).choices;
  assert.equal(cut.message.content, wanted.chat.slice(0, wanted.chat.indexOf(stop)));
  assert.equal(cut.finish_reason, "stop");
}

async function checkCompletion() {
  const answer = await client.completions.create({ ...completion, logprobs: 2 });
  assert.equal(answer.choices[0].text, wanted.completion);
  assert.equal(answer.choices[0].logprobs.tokens.join(""), wanted.completion);
  let text = "";
  for await (const chunk of await client.completions.create({ ...completion, stream: true })) {
    text += chunk.choices[0].text;
  }
  assert.equal(text, wanted.completion);
}

async function checkErrors() {
  await assert.rejects(client.chat.completions.create({ ...chat, model: "gpt-4" }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
    return true;
  });
  await assert.rejects(client.chat.completions.create({ ...chat, messages: [], stream: true }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "messages");
    return true;
  });
}

async function checkAbandonedStream() {
  const stream = await client.chat.completions.create({ ...chat, max_tokens: 1000, stream: true });
  for await (const _ of stream) break;
  assert.equal((await client.chat.completions.create(chat)).choices[0].message.content, wanted.chat);
}

await checkModels();
await checkChat();
await checkStream();
await checkStreamEvents();
await checkLogprobs();
await checkChoicesAndStop();
await checkCompletion();
await checkErrors();
await checkAbandonedStream();
