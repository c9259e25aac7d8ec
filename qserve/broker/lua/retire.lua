#!lua flags=allow-oom
-- RETIRE: forget a replica, but only once nothing is pending for it: XGROUP DELCONSUMER destroys pending entries silently.
-- KEYS[1] call stream, KEYS[2] heartbeat hash, KEYS[3] replicas hash | ARGV[1] group, ARGV[2] replica
-- returns 1 when it is gone
if redis.call('EXISTS', KEYS[1]) == 1 then
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2])
  if #pending > 0 then return 0 end
  redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
end
redis.call('HDEL', KEYS[2], ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[2])
return 1
