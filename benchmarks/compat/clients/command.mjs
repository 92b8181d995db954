// What the scripts of clients that are commands share.
import { execFile } from 'node:child_process';
import { mkdtempSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

// What a command of this directory prints, in a new directory that is also its home and holds `files`.
export function run(path, args, files = {}) {
  const cwd = mkdtempSync(join(tmpdir(), 'compat-'));
  for (const [name, content] of Object.entries(files)) writeFileSync(join(cwd, name), content);
  const [command, ...first] = [path].flat();
  return new Promise((resolve, reject) => {
    const child = execFile(command, [...first, ...args], { cwd, timeout: 300_000, env: { ...process.env, HOME: cwd, PWD: cwd } },
      (error, stdout, stderr) => error ? reject(new Error(`exit ${error.code}: ${stderr.slice(-250)}`)) : resolve(stdout));
    child.stdin.end();
  });
}
