#!lua flags=allow-oom
-- BEAT: bump a replica's counter; with entry ids (after a gap), say which of them it no longer owns.
-- Ownership is tested first: a bare XCLAIM to refresh an entry would steal it back from its new owner.
-- KEYS[1] call stream, KEYS[2] heartbeat hash, KEYS[3] meta hash
-- ARGV[1] group, ARGV[2] replica, ARGV[3] '1' if it takes calls, then entry ids
-- returns the ids that were taken over
local beat = redis.call('HGET', KEYS[2], ARGV[2])
if beat == 'dead' or beat == 'left' then redis.call('HSET', KEYS[2], ARGV[2], '0') end
redis.call('HINCRBY', KEYS[2], ARGV[2], 1)
if ARGV[3] == '1' and redis.call('EXISTS', KEYS[3]) == 1 then
  redis.call('HSET', KEYS[3], 'last_seen', redis.call('TIME')[1])
end
local lost = {}
for i = 4, #ARGV do
  local mine = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])
  if #mine == 0 then lost[#lost + 1] = ARGV[i] end
end
return lost
