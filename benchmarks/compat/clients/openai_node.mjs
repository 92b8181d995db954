import OpenAI from 'openai';
import { CITY, KEY, MESSAGES, MODEL, PROMPT, SCHEMA, URL, check, trial } from './trial.mjs';

const client = new OpenAI({ baseURL: `${URL}/v1`, apiKey: KEY, maxRetries: 0, timeout: 120_000 });
const chat = { model: MODEL, messages: MESSAGES, max_tokens: 8, temperature: 0 };

await trial('completions', async () => {
  check((await client.completions.create({ model: MODEL, prompt: PROMPT, max_tokens: 8 })).choices[0].text);
});
await trial('chat', async () => {
  check((await client.chat.completions.create(chat)).choices[0].message.content);
});
await trial('chat, streamed by the SDK\'s helper', async () => {
  check(await client.chat.completions.stream(chat).finalContent());
});
await trial('chat, JSON schema', async () => {
  const response_format = { type: 'json_schema', json_schema: { name: 'person', schema: SCHEMA, strict: true } };
  const answer = await client.chat.completions.parse({ ...chat, max_tokens: 300, response_format });
  check('age' in JSON.parse(answer.choices[0].message.content));
});
await trial('tools, required', async () => {
  const tools = [{ type: 'function', function: { name: 'weather', parameters: CITY } }];
  const answer = await client.chat.completions.create({ ...chat, max_tokens: 300, tools, tool_choice: 'required' });
  check(JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments).city);
});
await trial('responses', async () => {
  check((await client.responses.create({ model: MODEL, input: 'Tell me of a king.', max_output_tokens: 8 })).output.length);
});
