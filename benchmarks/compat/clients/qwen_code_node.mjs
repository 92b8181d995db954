import { join } from 'node:path';

import { run } from './command.mjs';
import { check, KEY, MODEL, trial, URL } from './trial.mjs';

const qwen = [process.execPath, join(import.meta.dirname, 'node_modules/.bin/qwen')];

await trial('one question, with its tools', async () => {
  const answer = await run(qwen, ['--auth-type', 'openai', '--openai-base-url', `${URL}/v1`, '--openai-api-key', KEY,
    '--model', MODEL, '--yolo', '--output-format', 'json', 'Say hello.']);
  const last = JSON.parse(answer).at(-1);
  check(last.type === 'result' && !last.is_error, JSON.stringify(last));
});
