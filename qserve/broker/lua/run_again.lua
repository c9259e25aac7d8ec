-- RUN_AGAIN: put a durable call that has failed on the queue again, under its own id.
-- KEYS[1] call stream, KEYS[2] record, KEYS[3] its payload | ARGV[1] id
-- returns 'forgotten' no such record | 'running' it has not ended | 'ended' it has, but cannot run again |
--   'deleted' no such deployment | 'queued'
local found = redis.call('HMGET', KEYS[2], 'state', 'n', 'again')
if not found[1] then return 'forgotten' end
if not ENDED[found[1]] then return 'running' end
if found[1] ~= 'failed' or not found[3] then return 'ended' end
local entry = enqueue(KEYS[1], ARGV[1], found[3])
if not entry then return 'deleted' end
redis.call('PERSIST', KEYS[2])
redis.call('PERSIST', KEYS[3])
redis.call('DEL', KEYS[3] .. ':r') -- what was stored apart of its last end
redis.call('HDEL', KEYS[2], 'result', 'ended', 'failures', 'expires', 'again')
note(KEYS[2], found[2], now_ms(), 'queued', '', 'state', 'queued', 'entry', entry)
return 'queued'
