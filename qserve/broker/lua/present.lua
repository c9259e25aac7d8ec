#!lua flags=allow-oom
-- PRESENT: say that the owner of an inbox lives. A plain SET would be refused at maxmemory and all would look dead.
-- The inbox has to stay: in one made anew after the clock was set back, ids would be below those that were read.
-- KEYS[1] liveness, KEYS[2] inbox | ARGV[1] ms that it counts as alive, ARGV[2] ms an unread inbox is kept
-- returns 1
redis.call('SET', KEYS[1], '1', 'PX', ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return 1
