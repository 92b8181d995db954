import Anthropic from '@anthropic-ai/sdk';
import { CITY, KEY, MESSAGES, MODEL, URL, check, trial } from './trial.mjs';

const client = new Anthropic({ baseURL: URL, apiKey: KEY, maxRetries: 0, timeout: 120_000 });
const asked = { model: MODEL, messages: MESSAGES, max_tokens: 8 };

await trial('messages', async () => {
  check((await client.messages.create(asked)).content.length);
});
await trial('messages, streamed', async () => {
  check((await client.messages.stream(asked).finalMessage()).content.length);
});
await trial('tools', async () => {
  const tools = [{ name: 'weather', input_schema: CITY }];
  const message = await client.messages.create({ ...asked, max_tokens: 300, tools, tool_choice: { type: 'any', disable_parallel_tool_use: true } });
  check(message.content.at(-1).input.city);
});
