import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import * as ai from 'ai';
import { CITY, KEY, MESSAGES, MODEL, SCHEMA, URL, check, trial } from './trial.mjs';

const provider = createOpenAICompatible({ name: 'ours', baseURL: `${URL}/v1`, apiKey: KEY, supportsStructuredOutputs: true });
const asked = { model: provider(MODEL), messages: MESSAGES, maxOutputTokens: 8, maxRetries: 0 };

await trial('generateText', async () => {
  check((await ai.generateText(asked)).text);
});
await trial('streamText', async () => {
  check(await ai.streamText({ ...asked, onError: ({ error }) => { throw error; } }).text);
});
await trial('generateObject', async () => {
  const { object } = await ai.generateObject({ ...asked, maxOutputTokens: 300, schema: ai.jsonSchema(SCHEMA) });
  check('age' in object);
});
await trial('generateText with tools, required', async () => {
  const tools = { weather: ai.tool({ description: 'The weather of a city.', inputSchema: ai.jsonSchema(CITY) }) };
  const { toolCalls } = await ai.generateText({ ...asked, maxOutputTokens: 300, tools, toolChoice: 'required' });
  check(toolCalls[0].input.city);
});
