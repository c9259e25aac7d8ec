-- ADMIT: put calls on a deployment's queue while there is room; nothing is put where nobody reads.
-- KEYS[1] call stream, KEYS[2] meta hash of the deployment, KEYS[3] name of this history of the state,
-- KEYS[4], KEYS[5] durable calls that will come into the stream, and so have their places already
-- ARGV[1] the latest time for that, in ms on this server's clock, or 0: a call that a connection has held back for longer
-- must not run any more; then per call: id, flags, frame
-- returns {-1} unknown deployment | {-2, reason} refused for all | {-3} too late for all |
--   {-4} there is no state at all: this server has lost it, or never had any |
--   {depth before, 1 if all its calls may run again, entry id or false per call}
local meta = redis.call('HMGET', KEYS[2], 'max_queued', 'refuse', 'idempotent')
if not meta[1] then return {redis.call('EXISTS', KEYS[3]) == 1 and -1 or -4} end
if meta[2] then return {-2, meta[2]} end
local latest = tonumber(ARGV[1])
if latest > 0 then
  local now = redis.call('TIME')
  if now[1] * 1000 + now[2] / 1000 > latest then return {-3} end
end
local room = tonumber(meta[1]) - redis.call('XLEN', KEYS[1])
if KEYS[5] and redis.call('EXISTS', KEYS[4], KEYS[5]) > 0 then
  room = room - redis.call('ZCARD', KEYS[4]) - redis.call('ZCARD', KEYS[5])
end
local out = {tonumber(meta[1]) - room, meta[3] == '1' and 1 or 0}
for i = 2, #ARGV, 3 do
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
