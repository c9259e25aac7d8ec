-- TAKE: take over entries of a replica that died or left. Taking from a dead one counts as a delivery; what a leaving
-- one hands back was never started, so it does not count.
-- KEYS[1] call stream, KEYS[2] heartbeat hash
-- ARGV[1] group, ARGV[2] replica, ARGV[3] me, ARGV[4] most to take, ARGV[5] '1': unsafe calls only,
-- ARGV[6] the heartbeat value by which it was judged; if it has beaten since, nothing is taken
-- returns {{deliveries, {entry id, fields}}, ...}
local beat = redis.call('HGET', KEYS[2], ARGV[2])
if beat ~= ARGV[6] then return {} end
local pending = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1000, ARGV[2])
local most = tonumber(ARGV[4])
local out = {}
for _, p in ipairs(pending) do
  if #out >= most then break end
  local wanted = true
  if ARGV[5] == '1' then
    local entry = redis.call('XRANGE', KEYS[1], p[1], p[1])
    -- fields: r, id, f, flags, d, frame
    wanted = not entry[1] or not string.find(entry[1][2][4], 's', 1, true)
  end
  if wanted then
    local deliveries = p[4] + 1
    if beat == 'left' then deliveries = p[4] end
    local taken = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, p[1], 'RETRYCOUNT', deliveries)
    if taken[1] then out[#out + 1] = {deliveries, taken[1]} end
  end
end
return out
