-- CANCEL: withdraw a call. One that is queued is deleted, and no replica will see it; one that runs is left to its replica.
-- KEYS[1] call stream | ARGV[1] group, ARGV[2] entry id
-- returns 1 withdrawn | 0 already gone | the replica's id
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[2], ARGV[2], 1)
if #pending == 1 then return pending[1][2] end
return redis.call('XDEL', KEYS[1], ARGV[2])
