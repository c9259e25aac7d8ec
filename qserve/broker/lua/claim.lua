#!lua flags=allow-oom
-- CLAIM: say that calls are about to run, so that none runs twice, wherever its frame is put again.
-- KEYS per call: bits of its caller's calls | ARGV per call: which bit, for how many ms it is to be known
-- returns per call 1 if nobody had claimed it
local out = {}
for i, key in ipairs(KEYS) do
  out[i] = 1 - redis.call('SETBIT', key, ARGV[2 * i - 1], 1)
  if redis.call('PTTL', key) < tonumber(ARGV[2 * i]) then redis.call('PEXPIRE', key, 2 * ARGV[2 * i]) end
end
return out
