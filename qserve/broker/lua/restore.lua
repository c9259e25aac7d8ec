-- RESTORE: put back a deployment that the server has forgotten. One that it knows stays as it is, and so does one that
-- was deleted, whose generation is left; of several that remember, the one with the newest generation wins.
-- KEYS  1 meta hash   2 set of deployment names   3 state log   4 call stream
-- ARGV  1 name   2 generation   3 spec frame   4 max_queued   5 route   6 state   7 error   8 consumer group
--       9 "1" if all its calls may run again
-- -> 1 if it was put back
local known = redis.call('HMGET', KEYS[1], 'gen', 'restored')
if known[1] and not (known[2] and tonumber(known[1]) < tonumber(ARGV[2])) then return 0 end
local log_id = redis.call('XADD', KEYS[3], 'MAXLEN', '~', 1000, '*', 'kind', 'deploy', 'name', ARGV[1], 'gen', ARGV[2])
redis.call('HSET', KEYS[1], 'gen', ARGV[2], 'spec', ARGV[3], 'max_queued', ARGV[4], 'route', ARGV[5],
  'state', ARGV[6], 'error', ARGV[7], 'log_id', log_id, 'idempotent', ARGV[9],
  'restored', '1')
redis.call('SADD', KEYS[2], ARGV[1])
redis.pcall('XGROUP', 'CREATE', KEYS[4], ARGV[8], '0', 'MKSTREAM')
return 1
