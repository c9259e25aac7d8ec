#!lua flags=allow-oom
-- HOLD_MODELS: say which models a replica holds, or holds no more.
-- KEYS[1] held models: 'm:' and a model -> the replicas that hold it, each followed by a space;
--   'r:' and a replica -> how many more models it can take in
-- ARGV[1] replica, ARGV[2] how many more models it can take in, or '': it takes no calls;
-- then per model: its name, '1' held or '0' held no more
-- returns 1
if ARGV[2] == '' then
  redis.call('HDEL', KEYS[1], 'r:' .. ARGV[1])
else
  redis.call('HSET', KEYS[1], 'r:' .. ARGV[1], ARGV[2])
end
local id = ARGV[1] .. ' '
for i = 3, #ARGV, 2 do
  local field = 'm:' .. ARGV[i]
  local holders = redis.call('HGET', KEYS[1], field) or ''
  local at, last = string.find(holders, id, 1, true)
  if ARGV[i + 1] == '1' then
    if not at then redis.call('HSET', KEYS[1], field, holders .. id) end
  elseif at then
    holders = string.sub(holders, 1, at - 1) .. string.sub(holders, last + 1)
    if holders == '' then redis.call('HDEL', KEYS[1], field) else redis.call('HSET', KEYS[1], field, holders) end
  end
end
return 1
