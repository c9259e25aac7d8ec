-- PAUSE: let calls of a deployment be accepted but not run, or run again.
-- KEYS[1] meta hash, KEYS[2] state log | ARGV[1] name, ARGV[2] who pauses it, '' to go on
-- returns 1, or 0 if there is no such deployment
if redis.call('HEXISTS', KEYS[1], 'spec') == 0 then return 0 end
if ARGV[2] ~= '' then
  redis.call('HSET', KEYS[1], 'paused', redis.call('TIME')[1] .. ' ' .. ARGV[2])
else
  redis.call('HDEL', KEYS[1], 'paused')
end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', 1000, '*', 'kind', 'pause', 'name', ARGV[1])
return 1
