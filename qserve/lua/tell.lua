#!lua flags=allow-oom
-- TELL: put a control message into a process' inbox, if the process lives.
-- KEYS[1] inbox, KEYS[2] liveness of its owner | ARGV[1] ms an unread inbox is kept, ARGV[2] frame
if redis.call('EXISTS', KEYS[2]) == 0 then return 0 end
redis.call('XADD', KEYS[1], '*', 'd', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[1])
return 1
