// What the scripts of Node's clients share; the same as trial.py.
export const URL = process.env.FPTQ_URL ?? 'http://127.0.0.1:8000';
export const MODEL = process.env.FPTQ_MODEL ?? 'demo';
export const KEY = 'none';
export const PROMPT = 'Once upon a time there was a king who';
export const MESSAGES = [{ role: 'user', content: 'Tell me of a king.' }];
export const SCHEMA = {
  type: 'object', properties: { name: { type: 'string', maxLength: 12 }, age: { type: 'integer', minimum: 0, maximum: 99 } },
  required: ['name', 'age'], additionalProperties: false,
};
export const CITY = {
  type: 'object', properties: { city: { type: 'string', enum: ['Paris', 'Oslo'] } }, required: ['city'], additionalProperties: false,
};

export function check(condition, what = '') {
  if (!condition) throw new Error(`unexpected: ${what}`);
}

export async function trial(name, attempt) {
  let result = 'pass', why = '';
  try {
    await attempt();
  } catch (error) {
    const text = `${error?.name}: ${error?.message} ${error?.responseBody ?? ''}`.split(/\s+/).join(' ').slice(0, 300);
    const refused = ['not_supported', 'not supported by this server', 'there is no endpoint', 'unknown_field'];
    result = refused.some((words) => text.includes(words)) ? 'refused' : 'fail';
    why = text;
  }
  console.log(JSON.stringify({ tried: name, result, why }));
}
