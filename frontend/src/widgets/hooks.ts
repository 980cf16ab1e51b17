import { useCallback, useEffect, useRef, useState } from "preact/hooks";
import type { Job } from "../api/contract";
import { followJob, isFinished } from "../api/job_following";

export interface Loaded<T> {
  value: T | null;
  error: Error | null;
  reload: () => void;
}

/** Loads a value again whenever the key changes; null until it is there. A value of another key is never shown. */
export function useLoaded<T>(key: string, load: () => Promise<T>): Loaded<T> {
  const [state, setState] = useState<{ key: string; value: T | null; error: Error | null }>({
    key,
    value: null,
    error: null,
  });
  const [round, setRound] = useState(0);
  const latest = useRef(load);
  latest.current = load;
  useEffect(() => {
    let current = true;
    latest
      .current()
      .then((value) => current && setState({ key, value, error: null }))
      .catch((error: Error) => current && setState({ key, value: null, error }));
    return () => {
      current = false;
    };
  }, [key, round]);
  const reload = useCallback(() => setRound((previous) => previous + 1), []);
  const own = state.key === key;
  return { value: own ? state.value : null, error: own ? state.error : null, reload };
}

/** Follows a job; returns its newest state. `onEnd` is called once, when it is finished. */
export function useJob(initial: Job | null, onEnd: (job: Job) => void): Job | null {
  const [job, setJob] = useState(initial);
  const end = useRef(onEnd);
  end.current = onEnd;
  useEffect(() => {
    setJob(initial);
    if (initial === null || isFinished(initial)) return;
    return followJob(initial.id, (changed) => {
      setJob(changed);
      if (isFinished(changed)) end.current(changed);
    });
  }, [initial?.id]);
  return job;
}

/** Returns a ref for an element and its width in CSS pixels, zero before it is known. */
export function useWidth<E extends HTMLElement>(): [(element: E | null) => void, number] {
  const [width, setWidth] = useState(0);
  const observer = useRef<ResizeObserver | null>(null);
  const attach = useCallback((element: E | null) => {
    observer.current?.disconnect();
    if (element === null) return;
    observer.current = new ResizeObserver((entries) => setWidth(Math.floor(entries[0]?.contentRect.width ?? 0)));
    observer.current.observe(element);
    setWidth(element.clientWidth);
  }, []);
  return [attach, width];
}
