-- REVIVE: put a dead letter of a durable call on the queue again, under its own id.
-- KEYS[1] dead-letter stream, KEYS[2] call stream, KEYS[3] record, KEYS[4] its payload | ARGV[1] letter, ARGV[2] id
-- returns 'absent' no such letter | 'forgotten' no such record | 'deleted' no such deployment | 'queued'
local letter = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])
if not letter[1] then return 'absent' end
local found = redis.call('HMGET', KEYS[3], 'state', 'n')
if found[1] ~= 'dead' then return 'forgotten' end
-- fields: r, id, f, flags, d, frame
local entry = enqueue(KEYS[2], ARGV[2], letter[1][2][6])
if not entry then return 'deleted' end
redis.call('PERSIST', KEYS[3])
redis.call('PERSIST', KEYS[4])
redis.call('DEL', KEYS[4] .. ':r') -- what was stored apart of its last end
redis.call('HDEL', KEYS[3], 'result', 'ended', 'failures', 'expires', 'letter')
note(KEYS[3], found[2], now_ms(), 'queued', '', 'state', 'queued', 'entry', entry)
redis.call('XDEL', KEYS[1], ARGV[1])
return 'queued'
