#!lua flags=allow-oom
-- NOTE_PART: record one of the parts that a running call gives, for whoever follows it. Parts and events are counted together.
-- KEYS[1] record, KEYS[2] its parts | ARGV[1] base, ARGV[2] entry id, ARGV[3] which part of this attempt, ARGV[4] frame,
-- ARGV[5] news for those who wait, ARGV[6] ms an unread inbox is kept, ARGV[7] which attempt
-- returns 1 if it stands there now | 0 the call is not this entry's any more, or another attempt has begun
local found = redis.call('HMGET', KEYS[1], 'state', 'entry', 'attempts', 'waiters', 'part')
if found[1] ~= 'running' or found[2] ~= ARGV[2] or found[3] ~= ARGV[7] then return 0 end
if found[5] and tonumber(found[5]) >= tonumber(ARGV[3]) then return 1 end -- sent again: the answer was lost
local n = redis.call('HINCRBY', KEYS[1], 'n', 1)
redis.call('HINCRBY', KEYS[1], 'parts', 1)
redis.call('HSET', KEYS[1], 'part', ARGV[3])
redis.call('XADD', KEYS[2], found[3] .. '-' .. n, 'd', ARGV[4], 'at', whole(now_ms()))
redis.call('PUBLISH', KEYS[1], n)
tell(ARGV[1], found[4], ARGV[5], ARGV[6])
return 1
