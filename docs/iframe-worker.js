// Lets the search work where the pages of the site are opened as files, from which browsers start no workers: there, the
// script of a worker runs in a hidden frame, and has the same messages.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.body.append(this.frame);
      const inside = this.frame.contentWindow;
      inside.postMessage = (data) => this.pass(data, (event) => {
        this.onmessage?.(event);
        this.dispatchEvent(event);
      });
      this.loaded = new Promise((loaded) => {
        const script = inside.document.createElement("script");
        script.src = new URL(url, location.href).href;
        script.onload = loaded;
        script.onerror = (event) => this.onerror?.(event);
        inside.document.body.append(script);
      });
    }

    postMessage(data) {
      this.loaded.then(() => this.pass(data, (event) => this.frame.contentWindow.dispatchEvent(event)));
    }

    pass(data, take) {
      const event = new MessageEvent("message", { data: structuredClone(data) });
      setTimeout(() => this.frame.isConnected && take(event));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
