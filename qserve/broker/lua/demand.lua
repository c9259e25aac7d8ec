-- DEMAND: how much there is to do for a deployment, and who is there to do it.
-- KEYS[1] call stream, KEYS[2] durable calls of low priority, KEYS[3] hash of workers by node
-- ARGV[1] group, ARGV[2] prefix of all alive keys
-- returns {calls queued and running, ms that the first of those nobody has taken has waited, ids of live nodes ...}
local out = {redis.call('XLEN', KEYS[1]) + redis.call('ZCARD', KEYS[2]), 0}
for _, group in ipairs(redis.call('EXISTS', KEYS[1]) == 1 and redis.call('XINFO', 'GROUPS', KEYS[1]) or {}) do
  local facts = {}
  for i = 1, #group, 2 do facts[group[i]] = group[i + 1] end
  if facts['name'] == ARGV[1] then
    local first = redis.call('XRANGE', KEYS[1], '(' .. facts['last-delivered-id'], '+', 'COUNT', 1)[1]
    if first then
      local now = redis.call('TIME')
      out[2] = math.max(0, now[1] * 1000 + math.floor(now[2] / 1000) - tonumber(string.match(first[1], '%d+')))
    end
  end
end
for _, node in ipairs(redis.call('HKEYS', KEYS[3])) do
  if redis.call('EXISTS', ARGV[2] .. node) == 1 then out[#out + 1] = node end
end
return out
