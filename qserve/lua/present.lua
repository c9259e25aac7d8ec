#!lua flags=allow-oom
-- PRESENT: say that the owner of an inbox lives. A plain SET would be refused at maxmemory and all would look dead.
-- KEYS[1] liveness | ARGV[1] ms
redis.call('SET', KEYS[1], '1', 'PX', ARGV[1])
return 1
