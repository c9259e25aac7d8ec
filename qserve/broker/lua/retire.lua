#!lua flags=allow-oom
-- RETIRE: forget a replica, but only once nothing is pending for it: XGROUP DELCONSUMER destroys pending entries silently.
-- KEYS[1] call stream, KEYS[2] heartbeat hash, KEYS[3] replicas hash, KEYS[4] held models, see hold_models.lua
-- ARGV[1] group, ARGV[2] replica
-- returns 1 when it is gone
if redis.call('EXISTS', KEYS[1]) == 1 then
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2])
  if #pending > 0 then return 0 end
  redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
end
redis.call('HDEL', KEYS[2], ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[2])
redis.call('HDEL', KEYS[4], 'r:' .. ARGV[2])
local id, held = ARGV[2] .. ' ', redis.call('HGETALL', KEYS[4])
for i = 1, #held, 2 do
  local at, last = string.find(held[i + 1], id, 1, true)
  if at and #held[i + 1] == #id then
    redis.call('HDEL', KEYS[4], held[i])
  elseif at then
    redis.call('HSET', KEYS[4], held[i], string.sub(held[i + 1], 1, at - 1) .. string.sub(held[i + 1], last + 1))
  end
end
return 1
