-- SLEEP: note that nobody needs a deployment for now, so that its replicas may leave; any call wakes it.
-- KEYS[1] meta hash, KEYS[2] call stream, KEYS[3] durable calls of low priority, KEYS[4] calls not due yet
-- ARGV[1] generation, ARGV[2] entries that had ever been in the stream when it was looked at last,
-- ARGV[3] ms within which no call may become due
-- returns 1, or 0 if it is needed, or is being deployed
local meta = redis.call('HMGET', KEYS[1], 'gen', 'spec', 'state')
if meta[1] ~= ARGV[1] or not meta[2] or meta[3] ~= 'HEALTHY' then return 0 end
if redis.call('EXISTS', KEYS[2]) == 0 or redis.call('XLEN', KEYS[2]) > 0 then return 0 end
local facts = redis.call('XINFO', 'STREAM', KEYS[2])
for i = 1, #facts, 2 do
  if facts[i] == 'entries-added' and facts[i + 1] ~= tonumber(ARGV[2]) then return 0 end
end
if redis.call('ZCARD', KEYS[3]) > 0 then return 0 end
local first = redis.call('ZRANGE', KEYS[4], 0, 0, 'WITHSCORES')
if first[2] then
  local now = redis.call('TIME')
  if first[2] - now[1] * 1000 - now[2] / 1000 < tonumber(ARGV[3]) then return 0 end
end
redis.call('HSET', KEYS[1], 'asleep', '1')
return 1
