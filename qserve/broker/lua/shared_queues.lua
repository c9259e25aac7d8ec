-- What DEMAND and COUNT_CALLS share; put before each of them.

-- How many entries of a stream are given to a consumer, and for how many ms the first of the others has waited.
local function taken_and_oldest(stream, name)
  local taken, oldest = 0, 0
  for _, group in ipairs(redis.call('EXISTS', stream) == 1 and redis.call('XINFO', 'GROUPS', stream) or {}) do
    local facts = {}
    for i = 1, #group, 2 do facts[group[i]] = group[i + 1] end
    if facts['name'] == name then
      taken = facts['pending']
      local first = redis.call('XRANGE', stream, '(' .. facts['last-delivered-id'], '+', 'COUNT', 1)[1]
      if first then
        local now = redis.call('TIME')
        oldest = math.max(0, now[1] * 1000 + math.floor(now[2] / 1000) - tonumber(string.match(first[1], '%d+')))
      end
    end
  end
  return taken, oldest
end
