-- What DEPLOY and RESTORE share; put before each of them. Only here is written what is deployed.
-- KEYS[1] meta hash, KEYS[2] set of deployment names, KEYS[3] state log, KEYS[4] call stream

-- `...`: names and values of fields, beside those that are written for every deployment.
local function write_deployment(name, generation, spec, state, error, group, ...)
  local log_id = redis.call('XADD', KEYS[3], 'MAXLEN', '~', 1000, '*', 'kind', 'deploy', 'name', name, 'gen', generation)
  redis.call('HSET', KEYS[1], 'gen', generation, 'spec', spec, 'state', state, 'error', error, 'log_id', log_id, ...)
  redis.call('SADD', KEYS[2], name)
  -- Calls may come before the first replica does; they are only admitted to a stream that exists.
  redis.pcall('XGROUP', 'CREATE', KEYS[4], group, '0', 'MKSTREAM')
  return log_id
end
