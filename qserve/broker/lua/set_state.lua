-- SET_STATE: note how far a deployment has come, unless it has moved on to another generation meanwhile.
-- KEYS[1] meta hash | ARGV[1] generation, ARGV[2] state, ARGV[3] error, ARGV[4] why calls are refused, or ''
-- returns 1, or 0 if it has moved on
if redis.call('HGET', KEYS[1], 'gen') ~= ARGV[1] or redis.call('HEXISTS', KEYS[1], 'spec') == 0 then return 0 end
redis.call('HSET', KEYS[1], 'state', ARGV[2], 'error', ARGV[3])
if ARGV[4] == '' then
  redis.call('HDEL', KEYS[1], 'refuse')
else
  redis.call('HSET', KEYS[1], 'refuse', ARGV[4])
end
return 1
