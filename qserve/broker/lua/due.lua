#!lua flags=allow-oom
-- DUE: put calls on the queue whose time has come, and calls of low priority while nothing else waits there.
-- Who holds the lease is asked in the same step that moves, so two movers cannot move the same call, whatever they
-- believe; the lease only keeps all but one from asking often.
-- KEYS[1] calls not due yet, KEYS[2] call stream, KEYS[3] lease, KEYS[4] calls of low priority
-- ARGV[1] base, ARGV[2] replica, ARGV[3] ms the lease is held, ARGV[4] most to move, ARGV[5] '1' whoever holds the
-- lease, ARGV[6] group
-- returns {'1' if the lease is ours, how many were moved, ms until the next is due or -1, how many of low priority wait}
local holder = redis.call('GET', KEYS[3])
local ours = not holder or holder == ARGV[2]
if not ours and ARGV[5] ~= '1' then return {'0', 0, -1, 0} end
if ours then redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[3]) end
local base, now, moved = ARGV[1], now_ms(), 0

local function move(set, id)
  local record = base .. 'call:' .. id
  local found = redis.call('HMGET', record, 'state', 'frame', 'n', 'low')
  if not found[1] or ENDED[found[1]] or not found[2] then
    redis.call('ZREM', set, id)
    return true
  end
  if set == KEYS[1] and found[4] then
    wait_in_turn(KEYS[4], now, id)
    redis.call('HSET', record, 'state', 'queued')
    index(record, redis.call('HGET', record, 'deployment'), found[1], 'queued', now)
  else
    local entry = enqueue(KEYS[2], id, found[2])
    if not entry then return false end
    redis.call('HDEL', record, 'frame', 'due')
    if set == KEYS[1] then
      note(record, found[3], now, 'queued', '', 'state', 'queued', 'entry', entry)
    else
      redis.call('HSET', record, 'entry', entry)
    end
  end
  redis.call('ZREM', set, id)
  moved = moved + 1
  return true
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[4])) do
  if not move(KEYS[1], id) then break end
end
local low = redis.call('ZCARD', KEYS[4])
if low > 0 and redis.call('EXISTS', KEYS[2]) == 1 then
  local waiting = redis.call('XLEN', KEYS[2]) - redis.call('XPENDING', KEYS[2], ARGV[6])[1]
  if waiting <= 0 then
    for _, id in ipairs(redis.call('ZRANGE', KEYS[4], 0, 15)) do
      if not move(KEYS[4], id) then break end
    end
  end
end
local next = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
return {ours and '1' or '0', moved, next[2] and math.max(0, next[2] - now) or -1, redis.call('ZCARD', KEYS[4])}
