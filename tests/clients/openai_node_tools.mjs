// openai-node, unchanged: answers of a given form, `parse`, and calls of tools, whole, streamed, and by its runner.
// Run by test_clients.py: argv[2] is the server, argv[3] how to draw. Calls are forced, as the demo model makes none.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [baseURL, wanted] = [process.argv[2], JSON.parse(process.argv[3])];
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0, timeout: 60_000 });
const ask = { model: "demo", messages: wanted.messages, seed: 1, ...wanted.drawn };

const Toy = z.object({ colour: z.enum(["red", "blue"]), price: z.int().min(0).max(99).nullable() });
const Pet = z.object({ name: z.string().max(12), kind: z.enum(["dog", "cat"]), toys: z.array(Toy).min(1).max(1) });
const Walk = z.object({ pet: z.enum(["dog", "cat", "fox"]), minutes: z.int().min(1).max(90) });

const tools = [
  zodFunction({ name: "walk", parameters: Walk, description: "Take a pet for a walk." }),
  zodFunction({ name: "buy-toy", parameters: Toy }),
];
const named = { type: "function", function: { name: "walk" } };

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

async function checkRequired() {
  for (const seed of [1, 2]) {
    const forced = { ...ask, seed, tools, tool_choice: "required" };
    const { message, finish_reason } = (await client.chat.completions.parse(forced)).choices[0];
    assert.equal(finish_reason, "tool_calls");
    assert.equal(message.content, null);
    assert.ok(message.tool_calls.length > 0);
    for (const call of message.tool_calls) {
      const schema = { walk: Walk, "buy-toy": Toy }[call.function.name];
      assert.deepEqual(call.function.parsed_arguments, schema.parse(JSON.parse(call.function.arguments)));
    }
    const [streamed] = (await client.chat.completions.stream(forced).finalChatCompletion()).choices;
    assert.equal(streamed.finish_reason, "tool_calls");
    assert.deepEqual(calls(streamed.message), calls(message));
  }
}

const calls = (message) => message.tool_calls.map((call) => [call.function.name, call.function.arguments]);

async function checkNamed() {
  const forced = { ...ask, tools, tool_choice: named };
  const [choice] = (await client.chat.completions.parse(forced)).choices;
  assert.equal(choice.finish_reason, "stop");
  Walk.parse(choice.message.tool_calls[0].function.parsed_arguments);
  let text = "";
  for await (const chunk of await client.chat.completions.create({ ...forced, stream: true })) {
    for (const call of chunk.choices[0].delta.tool_calls ?? []) text += call.function.arguments;
  }
  assert.equal(text, choice.message.tool_calls[0].function.arguments);
}

// The loop that calls functions and sends their answers: a named function is called once, then the loop ends.
async function checkRunner() {
  for (const stream of [false, true]) {
    const walks = [];
    const walk = zodFunction({ name: "walk", parameters: Walk, function: (walk) => walks.push(walk) && "It was fun." });
    const runner = client.chat.completions.runTools({ ...ask, stream, tools: [walk], tool_choice: named });
    await runner.done();
    assert.equal(walks.length, 1);
    Walk.parse(walks[0]);
    assert.equal(runner.messages.at(-1).content, "It was fun.");
  }
}

async function checkAnswersOfTools() {
  const first = (await client.chat.completions.create({ ...ask, tools, tool_choice: "required" })).choices[0].message;
  const answers = first.tool_calls.map(({ id }) => ({ role: "tool", tool_call_id: id, content: "They had fun." }));
  const second = { ...ask, messages: [...ask.messages, first, ...answers], tools, tool_choice: "auto", max_tokens: 16 };
  const [choice] = (await client.chat.completions.create({ ...second, temperature: 0 })).choices;
  assert.ok(choice.message.content.length > 0);
}

const { max_tokens, ...sampling } = wanted.drawn; // of which `responses` knows one, and passes the others on
const input = wanted.messages[0].content;
const respond = { model: "demo", input, store: false, seed: 1, max_output_tokens: max_tokens, ...sampling };

async function checkResponses() {
  const greedy = { model: "demo", input, temperature: 0, max_output_tokens: wanted.max_tokens };
  assert.equal((await client.responses.create(greedy)).output_text, wanted.chat);
  let text = "";
  for await (const event of await client.responses.create({ ...greedy, stream: true })) text += event.delta ?? "";
  assert.equal(text, wanted.chat);

  const format = { ...respond, text: { format: zodTextFormat(Pet, "pet") } };
  const parsed = await client.responses.parse(format);
  assert.deepEqual(parsed.output_parsed, Pet.parse(JSON.parse(parsed.output_text)));
  assert.deepEqual((await client.responses.stream(format).finalResponse()).output_parsed, parsed.output_parsed);
}

async function checkCallsOfResponses() {
  const tools = [zodResponsesFunction({ name: "walk", parameters: Walk })];
  const forced = { ...respond, tools, tool_choice: "required" };
  const { output } = await client.responses.parse(forced);
  assert.ok(output.length > 0);
  for (const call of output) assert.deepEqual(call.parsed_arguments, Walk.parse(JSON.parse(call.arguments)));
  const streamed = await client.responses.stream(forced).finalResponse();
  assert.deepEqual(streamed.output.map((call) => call.arguments), output.map((call) => call.arguments));
  const results = output.map(({ call_id }) => ({ type: "function_call_output", call_id, output: "They had fun." }));
  const items = output.map(({ parsed_arguments: _, ...call }) => call);
  const second = { ...respond, input: [...wanted.messages, ...items, ...results], tools, max_output_tokens: 16 };
  assert.ok((await client.responses.create({ ...second, temperature: 0 })).output_text.length > 0);
}

await checkParse();
await checkObject();
await checkRequired();
await checkNamed();
await checkRunner();
await checkAnswersOfTools();
await checkResponses();
await checkCallsOfResponses();
