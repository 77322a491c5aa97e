// In the head: an event is never begun on a stream of events that the server has ended.
// Gradio's client opens a stream unless it takes one for open. Nothing would tell of an event that is begun before
// the client has read of the last one's end: the reply to it waits until that stream tells of it, or is over.
{
  const LONGEST_WAIT_MS = 10_000;
  const request = window.fetch;
  let stream = null; // the last one: {told: ids of events, over, waiting: id -> what ends the wait for it}

  const follow = (signal) => {
    const place = { told: new Set(), over: false, waiting: new Map() };
    signal?.addEventListener("abort", () => { // by the client, which has read of the end
      place.over = true;
      for (const done of place.waiting.values()) done();
    });
    return place;
  };

  const readAlong = (place, reply) => {
    if (!reply.body) return reply;
    const decoder = new TextDecoder();
    let rest = "";
    const body = reply.body.pipeThrough(new TransformStream({
      transform(bytes, out) {
        out.enqueue(bytes);
        const lines = (rest + decoder.decode(bytes, { stream: true })).split("\n");
        rest = lines.pop();
        for (const line of lines) for (const [, id] of line.matchAll(/"event_id":"(\w+)"/g)) {
          place.told.add(id);
          place.waiting.get(id)?.();
        }
      },
    }));
    return new Response(body, reply);
  };

  const toldOf = (place, id) => place.over || place.told.has(id) || new Promise((done) => {
    place.waiting.set(id, done);
    setTimeout(done, LONGEST_WAIT_MS);
  });

  window.fetch = async (...values) => {
    const address = String(values[0]?.url ?? values[0]);
    if (address.includes("/queue/data?")) {
      const place = stream = follow((values[1] ?? values[0]).signal);
      return readAlong(place, await request(...values));
    }
    const reply = await request(...values);
    if (stream && reply.ok && address.includes("/queue/join")) {
      const event = await reply.clone().json().catch(() => null);
      if (event?.event_id) await toldOf(stream, event.event_id);
    }
    return reply;
  };
}
