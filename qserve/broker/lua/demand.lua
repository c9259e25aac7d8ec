-- DEMAND: how much there is to do for a deployment, and who is there to do it.
-- KEYS[1] call stream, KEYS[2] durable calls of low priority, KEYS[3] hash of workers by node
-- ARGV[1] group, ARGV[2] prefix of all alive keys
-- returns {calls queued and running, ms that the first of those nobody has taken has waited, ids of live nodes ...}
local _, oldest = taken_and_oldest(KEYS[1], ARGV[1])
local out = {redis.call('XLEN', KEYS[1]) + redis.call('ZCARD', KEYS[2]), oldest}
for _, node in ipairs(redis.call('HKEYS', KEYS[3])) do
  if redis.call('EXISTS', ARGV[2] .. node) == 1 then out[#out + 1] = node end
end
return out
