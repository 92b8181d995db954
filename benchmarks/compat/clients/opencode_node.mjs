import { join } from 'node:path';

import { run } from './command.mjs';
import { check, KEY, MODEL, trial, URL } from './trial.mjs';

const opencode = join(import.meta.dirname, 'node_modules/opencode-ai/bin/opencode.exe');  // its name on Linux, too
const config = (npm) => ({
  'opencode.json': JSON.stringify({
    share: 'disabled', autoupdate: false, model: `ours/${MODEL}`, small_model: `ours/${MODEL}`,
    provider: { ours: { npm, options: { baseURL: `${URL}/v1`, apiKey: KEY },
      models: { [MODEL]: { name: MODEL, limit: { context: 65536, output: 256 } } } } },
  }),
});

await trial('one question, with its tools', async () => {
  check((await run(opencode, ['run', 'Say hello.'], config('@ai-sdk/openai-compatible'))).trim());
});

await trial('one question, through responses', async () => {
  check((await run(opencode, ['run', 'Say hello.'], config('@ai-sdk/openai'))).trim());
});

await trial('one question, through messages', async () => {
  check((await run(opencode, ['run', 'Say hello.'], config('@ai-sdk/anthropic'))).trim());
});
