-- ADMIT: put calls on a deployment's queue while there is room; nothing is put where nobody reads.
-- KEYS[1] call stream, KEYS[2] meta hash of the deployment
-- ARGV    per call: id, flags, frame
-- returns {-1} unknown deployment | {-2, reason} refused for all | {depth before, entry id or false per call}
local meta = redis.call('HMGET', KEYS[2], 'max_queued', 'refuse')
if not meta[1] then return {-1} end
if meta[2] then return {-2, meta[2]} end
local room = tonumber(meta[1]) - redis.call('XLEN', KEYS[1])
local out = {tonumber(meta[1]) - room}
for i = 1, #ARGV, 3 do
  if room <= 0 then
    out[#out + 1] = false
  else
    local entry = redis.call('XADD', KEYS[1], 'NOMKSTREAM', '*', 'r', ARGV[i], 'f', ARGV[i + 1], 'd', ARGV[i + 2])
    if not entry then return {-1} end
    out[#out + 1] = entry
    room = room - 1
  end
end
return out
