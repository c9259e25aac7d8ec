-- EPOCH: note which server process holds the queues. After a restart or failover it is another one, which may have lost
-- what was done last: what stands in the queues at that moment is from before.
-- KEYS[1] run id of the server, KEYS[2] set of deployment names, KEYS[3] hash: deployment -> last entry from before
-- ARGV[1] run id, ARGV[2] prefix of all call streams, ARGV[3] deployment
-- returns the last entry of this deployment from before, or false
local known = redis.call('GET', KEYS[1])
if known ~= ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[1])
  for _, name in ipairs(known and redis.call('SMEMBERS', KEYS[2]) or {}) do
    local newest = redis.call('XREVRANGE', ARGV[2] .. name, '+', '-', 'COUNT', 1)
    if newest[1] then redis.call('HSET', KEYS[3], name, newest[1][1]) end
  end
end
return redis.call('HGET', KEYS[3], ARGV[3])
