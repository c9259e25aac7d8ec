#!lua flags=allow-oom
-- START_AGAIN: note that a call is about to run again, before it does. Not for one that was taken over meanwhile.
-- The entry's delivery count tells what happened to it: odd, it was started (count + 1) / 2 times; even, it was taken
-- from a replica that died and waits to be started once more. So a call that only waited where a replica died is not
-- blamed for it.
-- KEYS[1] call stream | ARGV[1] group, ARGV[2] replica, ARGV[3] entry id
-- returns 1 if the call is this replica's to run
local mine = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2])
if #mine == 0 then return 0 end
local count = mine[1][4]
if count % 2 == 0 then count = count + 1 end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'RETRYCOUNT', count, 'JUSTID')
return 1
