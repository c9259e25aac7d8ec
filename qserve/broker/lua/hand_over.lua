#!lua flags=allow-oom
-- HAND_OVER: give a call that was read and not started to another replica: one that holds the model it is for, where one
-- has room; where nobody holds it, one that can take it in without letting go of another model. A call for no model goes
-- to the replica that is named.
-- A replica has room for a call for its models while it has fewer calls than 16, or than twice the mean of all replicas:
-- so a model that many ask for comes to be held by several, and does not keep the other models of its replica waiting.
-- KEYS[1] call stream, KEYS[2] heartbeat hash, KEYS[3] held models, KEYS[4] inbox of the other replica, KEYS[5] liveness
-- of its owner
-- ARGV[1] group, ARGV[2] me, ARGV[3] entry id, ARGV[4] the other replica, or '', ARGV[5] frame for it, ARGV[6] ms an
-- unread inbox is kept, ARGV[7] model, or '', ARGV[8] how many more models I can take in
-- returns 1 given | 0 it is mine to run: no other replica is better placed, or the one named is gone | -1 it is not mine |
--   the id of the replica that it should be given to
local me, other, model = ARGV[2], ARGV[4], ARGV[7]
local mine = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1, me)
if #mine == 0 then return -1 end
local beats, replicas = {}, 0
local raw = redis.call('HGETALL', KEYS[2])
for i = 1, #raw, 2 do
  if raw[i + 1] ~= 'dead' and raw[i + 1] ~= 'left' then
    beats[raw[i]] = true
    replicas = replicas + 1
  end
end
if model ~= '' then
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1])
  local load = {}
  for _, each in ipairs(pending[4] or {}) do load[each[1]] = tonumber(each[2]) end
  local most = math.max(16, 2 * pending[1] / math.max(replicas, 1))
  local best, least = nil, most
  local holders = redis.call('HGET', KEYS[3], 'm:' .. model) or ''
  for id in string.gmatch(holders, '%S+') do
    if id == me then return 0 end
    if beats[id] and (load[id] or 0) < least then best, least = id, load[id] or 0 end
  end
  if not best and holders == '' and tonumber(ARGV[8]) <= 0 then
    local room = 0
    for id, _ in pairs(beats) do
      local has = tonumber(redis.call('HGET', KEYS[3], 'r:' .. id) or 0)
      if has > room and (load[id] or 0) < most then best, room = id, has end
    end
  end
  if best and best ~= other then return best end
  -- From now on it counts as held: the next call for it follows this one.
  local holder = best or me
  if not string.find(holders, holder, 1, true) then
    redis.call('HSET', KEYS[3], 'm:' .. model, holders .. holder .. ' ')
    if redis.call('HEXISTS', KEYS[3], 'r:' .. holder) == 1 then redis.call('HINCRBY', KEYS[3], 'r:' .. holder, -1) end
  end
  if not best then return 0 end
end
if not beats[other] or redis.call('EXISTS', KEYS[5]) == 0 then return 0 end
-- An even count of deliveries: it waits to be started, see start_again.lua.
redis.call('XCLAIM', KEYS[1], ARGV[1], other, 0, ARGV[3], 'RETRYCOUNT', 0, 'JUSTID')
redis.call('XADD', KEYS[4], '*', 'd', ARGV[5])
redis.call('PEXPIRE', KEYS[4], ARGV[6])
return 1
