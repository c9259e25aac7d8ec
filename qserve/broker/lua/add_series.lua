#!lua flags=allow-oom
-- ADD_SERIES: add to what metrics of user code have counted, as far as there is room for series that are new.
-- KEYS[1] totals of the deployment
-- ARGV[1] msgpack of series: {metric, {field, count, field, count, ...}}, each with a field first that every value has,
-- ARGV[2] most series of a metric, ARGV[3] most fields in all, ARGV[4] ms they are kept
-- returns how many series had no room
local dropped = 0
for _, series in ipairs(cmsgpack.unpack(ARGV[1])) do
  local count_of, fields = 'series ' .. series[1], series[2]
  local is_new = redis.call('HEXISTS', KEYS[1], fields[1]) == 0
  local found = tonumber(is_new and redis.call('HGET', KEYS[1], count_of) or 0)
  if is_new and (found >= tonumber(ARGV[2]) or redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[3])) then
    dropped = dropped + 1
  else
    if is_new then redis.call('HSET', KEYS[1], count_of, found + 1) end
    for i = 1, #fields, 2 do
      local sum = redis.pcall('HINCRBY', KEYS[1], fields[i], fields[i + 1])
      -- Beyond 64 bits it begins anew, as if its process had been started again.
      if type(sum) == 'table' and sum.err then redis.call('HSET', KEYS[1], fields[i], fields[i + 1]) end
    end
  end
end
if dropped > 0 then redis.call('HINCRBY', KEYS[1], 'user_metrics dropped', dropped) end
redis.call('PEXPIRE', KEYS[1], ARGV[4])
return dropped
