-- DELETE: forget a deployment. Its generation stays, so that nothing left of it can pass for a later deploy of the name.
-- KEYS[1] meta hash, KEYS[2] set of deployment names, KEYS[3] state log
-- ARGV[1] name, ARGV[2] expected generation, or '' for any
-- returns {'ok', generation, log id} | {'absent'} | {'generation', current}
local fields = redis.call('HMGET', KEYS[1], 'gen', 'spec')
if not fields[2] then return {'absent'} end
if ARGV[2] ~= '' and fields[1] ~= ARGV[2] then return {'generation', tonumber(fields[1])} end
local generation = tonumber(fields[1]) + 1
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], 'gen', generation)
redis.call('SREM', KEYS[2], ARGV[1])
local log_id = redis.call('XADD', KEYS[3], 'MAXLEN', '~', 1000, '*', 'kind', 'delete', 'name', ARGV[1], 'gen', generation)
return {'ok', generation, log_id}
