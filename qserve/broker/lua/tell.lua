#!lua flags=allow-oom
-- TELL: put a message into a process' inbox, if the process lives.
-- KEYS[1] inbox, KEYS[2] liveness of its owner
-- ARGV[1] ms an unread inbox is kept, ARGV[2] '1': in any case, ARGV[3] frame
-- returns 1 if it lives
local alive = redis.call('EXISTS', KEYS[2])
if alive == 0 and ARGV[2] ~= '1' then return 0 end
redis.call('XADD', KEYS[1], '*', 'd', ARGV[3])
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return alive
