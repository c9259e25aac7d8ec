-- DEPLOY: compare-and-set of a deployment's desired state. The route is checked before anything is written.
-- KEYS  1 meta hash   2 set of deployment names   3 state log   4 call stream   5 name of this history of the state
-- ARGV  1 name   2 expected generation   3 spec frame   4 max_queued   5 route, "" for none   6 prefix of all meta keys   7 consumer group
--       8 what to call the history, if it begins here   9 "1" if all its calls may run again
-- -> {"ok", generation, log id} | {"generation", current} | {"route", owner}
local generation = tonumber(redis.call('HGET', KEYS[1], 'gen') or '0')
if generation ~= tonumber(ARGV[2]) then
  return {'generation', generation}
end
if ARGV[5] ~= '' then
  for _, other in ipairs(redis.call('SMEMBERS', KEYS[2])) do
    if other ~= ARGV[1] and redis.call('HGET', ARGV[6] .. other, 'route') == ARGV[5] then
      return {'route', other}
    end
  end
end
generation = generation + 1
local log_id = redis.call('XADD', KEYS[3], 'MAXLEN', '~', 1000, '*', 'kind', 'deploy', 'name', ARGV[1], 'gen', generation)
redis.call('HSET', KEYS[1], 'gen', generation, 'spec', ARGV[3], 'max_queued', ARGV[4], 'route', ARGV[5],
  'state', 'DEPLOYING', 'error', '', 'log_id', log_id, 'idempotent', ARGV[9])
redis.call('HDEL', KEYS[1], 'refuse', 'restored')
redis.call('SET', KEYS[5], ARGV[8], 'NX')
redis.call('SADD', KEYS[2], ARGV[1])
-- Calls may come before the first replica does; they are only admitted to a stream that exists.
redis.pcall('XGROUP', 'CREATE', KEYS[4], ARGV[7], '0', 'MKSTREAM')
return {'ok', generation, log_id}
