-- SIGN: put a newer signature on a spec, unless the deployment has moved on to another generation meanwhile.
-- KEYS[1] meta hash | ARGV[1] generation, ARGV[2] spec frame
-- returns 1, or 0 if it has moved on
if redis.call('HGET', KEYS[1], 'gen') ~= ARGV[1] or redis.call('HEXISTS', KEYS[1], 'spec') == 0 then return 0 end
redis.call('HSET', KEYS[1], 'spec', ARGV[2])
return 1
