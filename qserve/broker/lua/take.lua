#!lua flags=allow-oom
-- TAKE: take over entries of a replica that died or left.
-- Entries that a leaving replica hands back were not started there; those of a dead one may have been, unless they still
-- waited to run again. start_again.lua tells what the delivery counts mean.
-- KEYS[1] call stream, KEYS[2] heartbeat hash
-- ARGV[1] group, ARGV[2] replica, ARGV[3] me, ARGV[4] most to take,
-- ARGV[5] of calls that may run again, those of which at most this start comes next: '0' takes only the others,
-- ARGV[6] the heartbeat value by which it was judged; if it has beaten since, nothing is taken
-- returns {{which start of the call comes next, {entry id, fields}}, ...}
local beat = redis.call('HGET', KEYS[2], ARGV[2])
if beat ~= ARGV[6] then return {} end
local left, most, up_to = beat == 'left', tonumber(ARGV[4]), tonumber(ARGV[5])
local out = {}
for _, p in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1000, ARGV[2])) do
  if #out >= most then break end
  local count = p[4]
  if left then
    if count > 1 then count = count - count % 2 end
  else
    count = count + count % 2
  end
  local start = math.floor(count / 2) + 1
  if count == 0 then count = 1 end -- handed over and not started: from here on it is like one that was just read
  local wanted = start <= up_to
  if not wanted then
    local entry = redis.call('XRANGE', KEYS[1], p[1], p[1])
    -- fields: r, id, f, flags, d, frame
    wanted = not entry[1] or (count > 1 and not string.find(entry[1][2][4] or '', 's', 1, true))
  end
  if wanted then
    local taken = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[3], 0, p[1], 'RETRYCOUNT', count)
    if taken[1] then out[#out + 1] = {start, taken[1]} end
  end
end
return out
