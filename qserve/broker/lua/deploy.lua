-- DEPLOY: compare-and-set of a deployment's desired state. The route is checked before anything is written.
-- KEYS[1] meta hash, KEYS[2] set of deployment names, KEYS[3] state log, KEYS[4] call stream,
-- KEYS[5] name of this history of the state
-- ARGV[1] name, ARGV[2] expected generation, ARGV[3] spec frame, ARGV[4] group, ARGV[5] route or '', ARGV[6] prefix of
-- all meta keys, ARGV[7] what to call the history, if it begins here, ARGV[8] the deployments whose routes are free, one
-- in each line, then names and values of the options that scripts look up
-- returns {'ok', generation, log id} | {'generation', current} | {'route', owner}
local generation = tonumber(redis.call('HGET', KEYS[1], 'gen') or '0')
if generation ~= tonumber(ARGV[2]) then return {'generation', generation} end
if ARGV[5] ~= '' then
  for _, other in ipairs(redis.call('SMEMBERS', KEYS[2])) do
    local moves = other == ARGV[1] or string.find('\n' .. ARGV[8] .. '\n', '\n' .. other .. '\n', 1, true)
    if not moves and redis.call('HGET', ARGV[6] .. other, 'route') == ARGV[5] then return {'route', other} end
  end
end
generation = generation + 1
redis.call('HDEL', KEYS[1], 'refuse', 'restored', 'asleep')
local log_id = write_deployment(ARGV[1], generation, ARGV[3], 'DEPLOYING', '', ARGV[4], unpack(ARGV, 9))
redis.call('SET', KEYS[5], ARGV[7], 'NX')
return {'ok', generation, log_id}
