#!lua flags=allow-oom
-- ADOPT: note that a call which another replica has handed over is about to run. Not for one that was taken over, or
-- answered, meanwhile. start_again.lua tells what the delivery count means.
-- KEYS[1] call stream | ARGV[1] group, ARGV[2] replica, ARGV[3] entry id
-- returns {entry id, fields}, or nothing if it is not this replica's to run
local mine = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, ARGV[2])
if #mine == 0 or mine[1][4] ~= 0 then return false end
local taken = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'RETRYCOUNT', 1)
return taken[1] or false
