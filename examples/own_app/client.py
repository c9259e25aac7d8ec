"""A Python program outside of the containers. Start the stack with docker-compose.redis.yml, then:

QSERVE_REDIS_URL=redis://127.0.0.1:6379/0 QSERVE_SECRET=... python client.py
"""

from qserve import serve

medians = serve.get_deployment("Medians").get_handle()
print(medians.of.remote([1.0, 5.0, 2.0]).result(timeout=10))
