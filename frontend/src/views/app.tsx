import { useEffect, useState } from "preact/hooks";
import { onKeyDemanded } from "../api/client";
import { hashOf, parseRoute, type Route } from "../figures/routes";
import { applyTheme, storedTheme, THEMES, type Theme } from "../style/theme";
import { CompareView } from "./compare_view";
import { ExpertsView } from "./experts_view";
import { KeyDialog } from "./key_dialog";
import { ModelFrame } from "./model_frame";
import { ModelList } from "./model_list";
import { PlanView } from "./plan_view";

function useRoute(): Route {
  const [route, setRoute] = useState(() => parseRoute(location.hash));
  useEffect(() => {
    const follow = () => setRoute(parseRoute(location.hash));
    window.addEventListener("hashchange", follow);
    return () => window.removeEventListener("hashchange", follow);
  }, []);
  return route;
}

const THEME_LABELS: Record<Theme, string> = { system: "◐ System", light: "○ Light", dark: "● Dark" };

function ThemeButton() {
  const [theme, setTheme] = useState(storedTheme());
  function next(): void {
    const chosen = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length] as Theme;
    applyTheme(chosen);
    setTheme(chosen);
  }
  return (
    <button type="button" class="plain theme" aria-label={`Theme: ${theme}. Change it`} onClick={next}>
      {THEME_LABELS[theme]}
    </button>
  );
}

function View({ route }: { route: Route }) {
  if (route.view === "models") return <ModelList />;
  return (
    <ModelFrame key={route.model} id={route.model} view={route.view}>
      {(model, reload) => {
        const profile = model.profiles[0];
        if (profile === undefined) return null;
        if (route.view === "experts") return <ExpertsView profileId={profile.id} />;
        if (route.view === "compare") return <CompareView first={route.first} second={route.second} />;
        return <PlanView model={model} reloadModel={reload} />;
      }}
    </ModelFrame>
  );
}

/** The whole page. */
export function App() {
  const route = useRoute();
  const [demand, setDemand] = useState<{ wrong: boolean; take: (key: string) => void } | null>(null);
  useEffect(() => {
    onKeyDemanded((wrong) => new Promise((resolve) => setDemand({ wrong, take: resolve })));
  }, []);
  return (
    <>
      <header class="masthead">
        <a class="mark" href={hashOf({ view: "models" })}>
          bitplan
        </a>
        <span class="tagline soft small">storage formats for a budget, with a proof</span>
        <ThemeButton />
      </header>
      <main>
        <View route={route} />
      </main>
      {demand !== null && (
        <KeyDialog
          wrong={demand.wrong}
          onKey={(key) => {
            setDemand(null);
            demand.take(key);
          }}
        />
      )}
    </>
  );
}
