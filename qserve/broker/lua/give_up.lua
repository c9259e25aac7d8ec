#!lua flags=allow-oom
-- GIVE_UP: move a call to the dead letters and answer its caller, once.
-- KEYS[1] call stream, KEYS[2] dead-letter stream, KEYS[3] inbox of the caller, KEYS[4] liveness of the caller
-- ARGV[1] group, ARGV[2] entry id, ARGV[3] reason, ARGV[4] most dead letters kept, ARGV[5] reply frame or '',
-- ARGV[6] ms an unread inbox is kept
-- returns 1 if the entry was still ours to give up
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
bury(KEYS[1], KEYS[2], ARGV[2], nil, ARGV[3], ARGV[4])
if ARGV[5] ~= '' and redis.call('EXISTS', KEYS[4]) == 1 then
  redis.call('XADD', KEYS[3], '*', 'd', ARGV[5])
  redis.call('PEXPIRE', KEYS[3], ARGV[6])
end
return 1
